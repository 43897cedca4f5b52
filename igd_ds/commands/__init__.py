"""The subcommands of `igd`, one file each: flags, checks and a call of the room that works."""
