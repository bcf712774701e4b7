"""What of nnsight 0.8.1's own tests does not hold with our classes, each with what it says and why."""

# Tests of pictures, pipelines and jobs, by name: what each says when it fails, and why that is right.
EXCEPTIONS = {
    "test_diffusion.py::TestRemoteSimulation::test_pipeline_is_a_persistent_object": (
        "KeyError: 'pipeline'",
        "How nnsight's model travels: part by part. Ours is one reference (ndif_client/remotable.py).",
    ),
}

# Tests of language models alone, GPT-2, BERT and BART, which no family of this package covers; they are made
# some for these tests, so that they come to our class. Patterns of names, of what they say, and why.
LANGUAGE_ONLY = (
    (
        r"test_language\.py::TestEarlyStop::test_a_stop_in_one_invoke_serves_its_siblings_that_step",
        r"DID NOT WARN",
        "A loop over all steps that a stop cuts is dropped with a warning there; here it ends with the run, "
        "and what follows it runs.",
    ),
    (
        r"test_deprecations\.py::TestInventory::test_(vision_)?language_model",
        r"DID NOT WARN",
        "nnsight warns that a name of its own is old. These tests are given our class under that name.",
    ),
    (
        r"test_serialization\.py::TestParentLinks::test_a_shipped_tree_relinks_itself",
        r"is not GPT2LMHeadModel",
        "A shipped model is one reference here, and its tree is not sent.",
    ),
    (
        r"test_serialization\.py::TestModelKey::test_transformers_key_names_its_class",
        r"mm_adapters\.",
        "A service makes of our key our class, which the key therefore names.",
    ),
    (
        r"test_modeling\.py::TestTransformers",
        r"the hub cannot be reached",
        "The test puts a function of its own in place of transformers' pipeline, which loads nothing here.",
    ),
    (
        r"test_pretokenized\.py::test_(a_tensor_outside_the_table|each_field_is_padded)",
        r"does not take (cache_position=|special_tokens_mask=, global_attention_mask=)",
        "GPT-2 takes no such argument, and transformers drops it without a word; here that is an error.",
    ),
    (
        r"test_pretokenized\.py::test_ids_of_more_than_two_dimensions_get_a_mask_per_token",
        r"reads \[row, token\]",
        "The heads that this package's models have read rows of tokens, and a third axis is a mistake.",
    ),
)  # fmt: skip

# Why a test of theirs is skipped, by what it says.
SKIPS = {
    r"could not import 'librosa'": "Sound is none of this package's kinds.",
    r"the crash doesn't reproduce on this interpreter": "It shows a crash of CPython that is gone.",
    r"could not import '(timm|pandas|vllm|bitsandbytes)'": "No dependency of this package.",
    r"C \.save\(\) mount not built": "nnsight's own extension is switched off.",
    r"torch\.compile|needs.*compil|CUDA|GPU|cuda": "Needs a compiler or a GPU.",
}
