"""What one policy rank does: torch alone, over a backend that holds its models (deepspeed/, or embedded/ in one
process)."""
