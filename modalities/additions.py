"""Demo: additions of two-digit numbers, column by column: `7+5=12 4+8+1=13 =132`."""

from mmopd.task import Task, verify

task = Task(name="additions", modality="text", verify=verify.number_after_equals)
