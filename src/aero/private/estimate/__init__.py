"""What a private run will cost, from its public description alone: bytes, rounds, memory, seconds."""
