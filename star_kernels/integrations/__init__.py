"""Replacements for parts of existing trainers; each module can be imported without its trainer.

``flow_grpo`` has the step and loss of Flow-GRPO, ``verl_omni`` the losses for VeRL-Omni's registry, ``unirl`` the
algorithms of UniRL and ``flow_factory`` the trainers of Flow-Factory. They use
``schedule`` (the transitions of a diffusers scheduler, by timestep), ``means`` (the loss from means of transitions),
``record`` (the maps of a rollout), ``layout`` (channel dimensions and grids), ``sampler_check`` (whether a trainer's
log-probabilities are those of a sampler) and ``agreement`` (how far two log-probabilities differ).
docs/flow-grpo.md, verl-omni.md, unirl.md and flow-factory.md are the guides.
"""
