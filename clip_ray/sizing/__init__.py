"""How large a cluster: what a run takes, from its config alone. No Ray, no GPU, no model built.

- `counts`: parameters, operations and saved activations of an architecture.
- `gpus`: types of GPUs and the machines they come in.
- `calibration`: how fast a GPU trains, by the published runs.
- `memory`: what a GPU holds, and the micro-batch that fits.
- `plan`: all of it together: memory, time, network, storage and cost of a run.
- `advice`: what is wrong with a plan, and the way out.
- `report`: questions and answers of `jobs/plan.py`.

Left out: preemptions and restarts, start-up, evaluation, the price of nodes that only decode.
"""

from clip_ray.sizing.gpus import Cluster
from clip_ray.sizing.plan import Assumptions, Plan, plan
from clip_ray.sizing.report import Answer, Question, answer

__all__ = ["Answer", "Assumptions", "Cluster", "Plan", "Question", "answer", "plan"]
