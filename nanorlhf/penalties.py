"""Feature penalties: what a text's latents take from its reward, and edits of the latents themselves.

    B texts, F chosen features; z is what a sparse autoencoder makes of the hidden state at a text's pooled (last real) token
"""

import torch

OPS = ("set", "min", "max", "*", "+")


def edit_latents(z, edits):
    """z [.., F] and one (op, value) for each of its F columns -> z' [.., F], a new tensor.

        set: z' = v     min: z' = max(z, v), a floor     max: z' = min(z, v), a cap     *: z' = v z     +: z' = z + v

    `min` and `max` are torch.clamp's. ValueError: another number of edits than columns, an unknown op. Pitfall: a latent that does not
    fire is 0, so `set` and `+`, a floor above 0 and a cap below 0 change every text.
    """
    if len(edits) != z.shape[-1]:
        raise ValueError(f"{len(edits)} edits for {z.shape[-1]} features")
    columns = []
    for (op, v), x in zip(edits, z.unbind(-1)):
        if op not in OPS:
            raise ValueError(f"edit {op!r} is not one of {', '.join(OPS)}")
        new = {"set": torch.full_like(x, v), "min": x.clamp(min=v), "max": x.clamp(max=v), "*": x * v, "+": x + v}[op]
        columns.append(new)
    return torch.stack(columns, -1) if columns else z.clone()
