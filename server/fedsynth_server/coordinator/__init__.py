"""What a coordinator keeps running: SuperLink, gateway and study runner; who may take part; what people ask about it."""
