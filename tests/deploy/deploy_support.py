"""The study whose network these tests pick."""

from cactus_ray.config import DataConfig
from cactus_ray.verification.verdict import VerificationSettings

EPSILON = 0.08
DIGITS = DataConfig(name="digits")
QUICK = VerificationSettings(attack_steps=5, restarts=1)
LEVELS = ("dense", "int8", "int4")
SPACE = f"""
name: tiny
data: {{name: digits}}
model: {{name: mlp, hidden: [24]}}
threat: {{norm: linf, epsilon: {EPSILON}}}
levels: [dense, int8, int4]
train: {{epochs: 12}}
parameters:
  method: {{value: ibp}}
  learning_rate: {{min: 0.001, max: 0.01}}
objectives:
  - {{metric: mean_certified_accuracy, goal: maximize}}
front: {{certified_accuracy: maximize, bytes: minimize, standard_accuracy: maximize}}
search: {{trials: 1, sampler: random, seed: 0}}
verification: {{attack_steps: 5, restarts: 1}}
"""
CONFIG = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [24]},
    "threat": {"epsilon": EPSILON},
    "train": {"epochs": 12},
    "method": "ibp",
}
