"""
The launcher: `trl-ext <method> --config FILE [options]`, which the recipes call too.

Everything that a command is lies in the table of [`~trl_ext.launch.commands`]; a new method is one row there.
"""
