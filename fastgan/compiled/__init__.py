"""A function of tensors, derivatives of any order inside it, recorded once and compiled as one program."""
