"""Apply the Uni-OPD recipe to tensors: two prompts, with responses of a few tokens each.

    python examples/opd_on_tensors.py

Letters: N responses, M tokens of all of them.
"""

import torch

from mmopd import load_recipe, opd

# Prompt 0 has two right responses and a wrong one, prompt 1 a right one and a wrong one.
GROUP = torch.tensor([0, 0, 0, 1, 1])  # [N]
OUTCOME = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])  # [N] 1 right, 0 wrong, NaN unknown
RESPONSE = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 4])  # [M] the response that a token belongs to
STUDENT = torch.tensor([-0.5, -0.2, -1.0, -0.3, -0.1, -0.2, -0.4, -0.9, -0.6, -0.1])  # [M] log-probs
TEACHER = torch.tensor([-0.2, -0.1, -0.4, -0.2, -0.1, -0.9, -0.8, -1.5, -0.9, -0.2])  # [M]

algorithm = load_recipe("recipes/demo.yaml").algorithm
targets = opd(
    TEACHER,
    STUDENT,
    RESPONSE,
    outcome=OUTCOME,
    group=GROUP,
    weight=torch.ones(len(OUTCOME)),
    settings=algorithm,
    seed=0,
)

print("response  right  in the loss  advantage of its tokens")
for i in range(len(OUTCOME)):
    advantage = " ".join(f"{value:+.2f}" for value in targets.advantage[i == RESPONSE].tolist())
    print(f"{i:8}  {bool(OUTCOME[i])!s:5}  {bool(targets.keep[i])!s:11}  {advantage}")
# Prompt 1: the teacher ranked the right response below the wrong one. The shift turns the order round.
seen = targets.diagnostics
print(f"groups in the right order: {seen['order_before']:.0%} before the margin shift, {seen['order_after']:.0%} after")
