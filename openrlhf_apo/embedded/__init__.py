"""The embedded runtime: policy, engine and trainer in one process, on plain torch. No Ray, DeepSpeed or vLLM."""
