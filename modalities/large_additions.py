"""Demo: additions with a sum of three digits, for runs in which small and large additions have their own teachers."""

from mmopd.task import Task, verify

task = Task(name="large_additions", modality="text", verify=verify.number_after_equals)
