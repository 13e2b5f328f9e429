"""Studies of whether an allocation of the advantage helps: agreement of gradients, and learning curves."""
