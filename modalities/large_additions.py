"""Demo: additions with a sum of three digits, where these and the smaller ones have teachers of their own."""

from mmopd.task import Task, verify

task = Task(name="large_additions", modality="text", verify=verify.number_after_equals)
