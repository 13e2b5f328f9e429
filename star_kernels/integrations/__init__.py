"""Drop-ins for the trainers that people run: one file a trainer, each importable without it.

``flow_grpo`` (Flow-GRPO's step and loss), ``verl_omni`` (a loss for VeRL-Omni's registry, from means instead of
velocities), and what they stand on: ``schedule`` (transitions of a diffusers scheduler, by timestep) and ``record``
(maps of a rollout). The guides are docs/flow-grpo.md and docs/verl-omni.md.
"""
