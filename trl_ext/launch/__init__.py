"""
The launcher: `trl-ext <method> --config FILE [options]`. The recipes call it as well.

Commands are defined in the table of [`~trl_ext.launch.commands`]; a new method is one row there.
"""
