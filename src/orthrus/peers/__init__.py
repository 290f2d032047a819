"""Published drafters, as implementations of `orthrus.decode.drafters.Drafter`, and block-diffusion language models."""
