"""Demo: the sum of two handwritten digits: `3+5=8`."""

from mmopd.task import Task, verify

task = Task(name="digit_sum", modality="image", verify=verify.number_after_equals)
