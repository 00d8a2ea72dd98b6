"""The gateway: a fine-tuning API in the OpenAI wire format that screens what it trains on and checks what it serves."""
