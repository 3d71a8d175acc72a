"""What to run: the YAML files, their schema, and the way from a command line to one checked config.

`from configs import compose; cfg, model_cfg = compose(["hydra_model_cfg=gpt2", "preset=tiny"])`
"""

from configs.compose import compose

__all__ = ["compose"]
