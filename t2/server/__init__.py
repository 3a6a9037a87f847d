"""An OpenAI-shaped server on the continuous-batching engine (`t2 serve`)."""
