"""diffusers' scheduler classes, family by family: a config and a number of steps make a `Plan`.

`profiles.diffusers` is the way in. Numbers are computed as diffusers does, in float32 where it
does, and its quirks are kept: a plan is right when the same network sees the same timesteps there.
"""
