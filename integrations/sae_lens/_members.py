"""What of SAELens' two model classes a model and a tower have: member -> "" as theirs, else the reason.

Members that the classes inherit from TransformerLens stand in that integration's table.
"""

MEMBERS: dict[str, str] = {
    "acts_to_saes": "",
    "add_sae": "",
    "forward": "",
    "get_sae_hook_name": "",
    "reset_saes": "",
    "run_with_cache_with_saes": "",
    "run_with_hooks_with_saes": "",
    "run_with_saes": "",
    "saes": "",
    "boot_transformers": "a constructor of theirs: mm.load(...) and mm.wrap(...) make a model, whose "
    "towers and itself have the verbs once integrations.sae_lens is imported",
    "hook_dict": "",
}
