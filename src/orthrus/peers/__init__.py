"""Drafters of others, behind the seam of `orthrus.decode.drafters`, and diffusion language models beside them."""
