"""What of nnsight 0.8.1's own tests does not hold with our classes, each with what it says and why."""

# Tests of pictures, pipelines and jobs, by name: what each says when it fails, and why that is right.
EXCEPTIONS = {
    "test_vision.py::TestImageClassification::test_vision_pipeline_has_no_tokenizer": (
        "has attribute '_is_causal'",
        "The last line asks nnsight's private word for the side to pad at; ours is the tokenizer's.",
    ),
    "test_diffusion.py::TestText2Audio::test_it_has_no_entry_for_an_image_architecture": (
        "CheckpointError: .* can't find a pipeline linked to StableDiffusionPipeline",
        "What diffusers refuses is a CheckpointError here, with its words; the test wants its ValueError.",
    ),
    "test_diffusion.py::TestAutomodelErrors::test_a_name_that_is_not_in_diffusers": (
        "InputError: automodel='NoSuchPipeline'",
        "What cannot be taken is an InputError here, with the nearest names; the test wants AttributeError.",
    ),
    "test_diffusion.py::TestRemoteSimulation::test_pipeline_is_a_persistent_object": (
        "KeyError: 'pipeline'",
        "How nnsight's model travels: part by part. Ours is one reference (ndif_client/remotable.py).",
    ),
}

# Tests of language models alone, GPT-2 and BERT, which no family of this package covers; GPT-2 is made one
# for these tests, so that they come to our class. Patterns of names, of what they say, and why.
LANGUAGE_ONLY = (
    (
        r"test_language\.py::TestPeft",
        r"",
        "peft= attaches an adapter while a name is loaded. Here PeftModel(...) is wrapped.",
    ),
    (
        r"test_language\.py::TestAttnImplementation",
        r"attribute 'attn_implementation'|DID NOT RAISE",
        "A job's environment holds the attention of a checkpoint; the model has no attribute of that name.",
    ),
    (
        r"test_language\.py::.*test_tokenizer_kwargs_reach_the_tokenizer",
        r"does not take tokenizer_kwargs|weights_only",
        "tokenizer_kwargs= is none of our options: a tokenizer is given as tokenizer=.",
    ),
    (
        r"test_(language|deprecations)\.py::",
        r"DID NOT WARN",
        "nnsight warns that a name of its own is old. Ours are not old, and warn of nothing.",
    ),
    (
        r"test_batching\.py::(TestTraceBatching|TestInvokerGrouping|TestInvokerInputFormats)",
        r"assert False|assert tensor\(\d+\) == tensor\(\d+\)",
        "Rows of a decoder with learned positions are padded at the tokenizer's own side, here the right; "
        "only those of one with rotary positions at the left, where no position counts the padding.",
    ),
    (
        r"test_batching\.py::TestInvokerInputFormats::test_per_invoke_truncation",
        r"truncation=",
        "Options of a tokenizer in a call. Here a text that is too long is an error, and is cut before.",
    ),
    (
        r"test_batching\.py::.*(test_batched_generate_returns_per_prompt|test_batched_generation_matches)",
        r"Cannot invoke while the model is already running",
        "Several invokes in transformers' own text pipeline. generate takes several.",
    ),
    (
        r"test_serialization\.py::TestParentLinks::test_a_shipped_tree_relinks_itself",
        r"is not GPT2LMHeadModel",
        "A shipped model is one reference here, and its tree is not sent.",
    ),
    (
        r"test_serialization\.py::TestModelKey::test_key_carries_the_resolved_task",
        r"KeyError: 'task'",
        "Our key names the checkpoint; the class is read off it, and no task is needed.",
    ),
    (
        r"test_modeling\.py::TestTransformers",
        r"the hub cannot be reached",
        "The test puts a function of its own in place of transformers' pipeline, which loads nothing here.",
    ),
    (
        r"test_modeling\.py::TestPreloadedModule",
        r"assert None is not None|came without a processor",
        "A module that is here is called with its own tensors, unless a tokenizer is given with it.",
    ),
    (
        r"test_(pretokenized|encoder_decoder)\.py::",
        r"of use with a name only",
        "A module that is here is where it is: device= is of use with a name.",
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
