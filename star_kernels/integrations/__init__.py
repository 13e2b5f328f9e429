"""Drop-ins for the trainers that people run, each importable without its trainer.

``flow_grpo`` is Flow-GRPO's step and loss; ``verl_omni`` a loss for VeRL-Omni's registry. They stand on ``schedule``
(the transitions of a diffusers scheduler, by timestep), ``means`` (the loss from means of transitions), ``record`` (the
maps of a rollout) and ``layout``. The guides are docs/flow-grpo.md and docs/verl-omni.md.
"""
