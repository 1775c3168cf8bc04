"""APO: alpha-divergence preference optimisation (arXiv 2512.22953) as a trainer on OpenRLHF."""

__version__ = "0.1.0"
__all__ = ["train"]


def __getattr__(name: str):
    if name == "train":  # loads torch and transformers
        from openrlhf_apo.from_python import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
