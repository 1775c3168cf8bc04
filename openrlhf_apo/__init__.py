"""APO: alpha-divergence preference optimisation (arXiv 2512.22953) as a trainer on OpenRLHF."""

__version__ = "0.1.0"
