"""Strategies inside axolotl, through its `BasePlugin`. Put this file beside the YAML of the run, and there:

    plugins: [axolotl_ftplus.FTPlusPlugin]
    ftplus: {strategies: [ewc, distill], protect: protect.jsonl}
    max_grad_norm: 0        # or the penalty of ewc, which is added after clipping, weighs more than it says

Written for axolotl 0.19, which pins TRL 1.9, where hf-ftplus asks for 1.16: pip cannot resolve both (`pip install
--no-deps hf-ftplus` puts it there). What was tried: see examples/README.md.
"""

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import hf_ftplus


class FTPlusArgs(BaseModel):
    """The key `ftplus` of the YAML: strategies, protect, memory."""

    ftplus: dict | None = None


class FTPlusPlugin(BasePlugin):
    """Attaches what the YAML names, once axolotl has made its trainer."""

    def get_input_args(self):
        return f"{__name__}.FTPlusArgs"

    def post_trainer_create(self, cfg, trainer):
        given = dict(cfg.ftplus or {})
        hf_ftplus.attach(trainer, *given.pop("strategies", []), **given)
