"""Whether an allocation of the advantage helps: agreement of gradients and learning curves."""
