"""A memory made on purpose, to be given away: others protect a public model without the data it stands for.

made.py     the importances of EWC, once, for all weights or for adapters
hub.py      to the Hub and from it: safetensors, JSON and a card
base.py     which model a memory is of, told by the content of its weights

A folder holds what `state.py` writes (`manifest.json`, `ewc.safetensors`), `base.json`, which says what model that is,
and, once it was pushed, a card. What EWC holds weights to, the starting weights, is that model itself.
"""
