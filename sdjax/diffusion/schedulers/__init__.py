"""How other programs make a `Plan` of a number of steps, a program or a family of schedulers each.

`profiles` is the way in. Of diffusers' scheduler classes, numbers are computed as diffusers does,
in float32 where it does, and its quirks are kept: a plan is right when the same network sees the
same timesteps there.
"""
