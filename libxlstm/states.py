"""States of models and BlockStacks, a list of tensors for each block. In each tensor the first dimension counts sequences."""

import torch


def detach(state):
    """The same values, through which no gradient goes back: between the pieces of truncated backpropagation through time.
    None, the state before the first token, stays None."""
    return state and [[tensor.detach() for tensor in block] for block in state]


def split_state(state):
    """The states of the single sequences, a list of B states of one sequence each, which share no memory."""
    blocks = [[tensor.split(1) for tensor in block] for block in state]
    sequences = max((len(parts) for block in blocks for parts in block), default=0)
    return [[[parts[row].clone() for parts in block] for block in blocks] for row in range(sequences)]


def merge_states(states):
    """One state of all the sequences that the states of a list have, in their order. Not of kinds whose state grows (llama,
    gpt, hyena) where one has read more than another."""
    return [[torch.cat(tensors) for tensors in zip(*blocks, strict=True)] for blocks in zip(*states, strict=True)]
