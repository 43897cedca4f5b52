"""Settings: how they are declared, parsed and checked."""
