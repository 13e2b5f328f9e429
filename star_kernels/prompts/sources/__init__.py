"""Sources of a prompt's core content: quoted text, content words, phrases that the user names, GenEval's metadata.

Each function takes a prompt and returns its :class:`star_kernels.prompts.Core`;
:func:`star_kernels.prompts.core_content` chooses among them.
"""
