"""The tokenizer of a checkpoint as one of the Hugging Face ecosystem, and back."""

from pathlib import Path
from typing import Any

from slm.data.tokenizer import END_OF_TEXT, ByteTokenizer, SubwordTokenizer, byte_characters, import_tokenizers
from slm.errors import InputError, check
from slm.formats.hugging_face import import_transformers
from slm.messages import say


def as_transformers_tokenizer(dumped: str | None, vocab_size: int, max_seq_len: int) -> Any:
    """The tokenizer of a checkpoint as one of `transformers`; one of numbers where it has none."""
    library, end_of_text = library_tokenizer(dumped, vocab_size)
    post_processor = library.post_processor
    tokenizer = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token=end_of_text,
        eos_token=end_of_text,
        model_max_length=max_seq_len,
        model_input_names=["input_ids", "attention_mask"],  # others would be added to the embedding
        clean_up_tokenization_spaces=False,
    )
    tokenizer.backend_tokenizer.post_processor = post_processor  # which is given one of its own
    return tokenizer


def library_tokenizer(dumped: str | None, vocab_size: int) -> tuple[Any, str | None]:
    """The tokenizer of a checkpoint as one of the `tokenizers` library, and what it calls the end of a text."""
    tokenizers = import_tokenizers()
    models = tokenizers.models
    if dumped is None:  # the numbers of the tokens
        library = tokenizers.Tokenizer(models.WordLevel({str(number): number for number in range(vocab_size)}))
        library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        return library, None
    if dumped == "bytes":
        names = byte_characters()
        names[ByteTokenizer.end_of_text] = END_OF_TEXT
        library = tokenizers.Tokenizer(models.BPE({name: byte for byte, name in enumerate(names)}, []))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        return library, END_OF_TEXT
    library = tokenizers.Tokenizer.from_str(dumped)
    return library, library.id_to_token(SubwordTokenizer(dumped).end_of_text)


def dumped_tokenizer(folder: Path, vocab_size: int) -> str | None:
    """The tokenizer in a folder, as a checkpoint holds it; None where there is none, or numbers alone."""
    tokenizers = import_tokenizers()
    try:
        if (folder / "tokenizer.json").is_file():
            library = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8-sig"))
        elif (folder / "vocab.json").is_file():  # of the days before that
            auto = import_transformers().AutoTokenizer
            library = auto.from_pretrained(folder, local_files_only=True).backend_tokenizer
        elif (folder / "tokenizer.model").is_file():
            remedy = 'write it with transformers: AutoTokenizer.from_pretrained("FOLDER").save_pretrained("FOLDER")'
            raise InputError(f"{folder} has a tokenizer.model, but no tokenizer.json: {remedy}")
        else:
            return None
    except InputError:
        raise
    except Exception as error:  # the libraries' own are of many kinds
        raise InputError(f"{folder} has a tokenizer that cannot be read: {error}") from error
    for dumped in (None, "bytes"):
        if library.get_vocab() == library_tokenizer(dumped, vocab_size)[0].get_vocab():
            return dumped
    tokenizer = SubwordTokenizer(library.to_str(), str(folder))
    fits = tokenizer.vocab_size <= vocab_size
    check(fits, f"{folder} has a tokenizer of {tokenizer.vocab_size} ids, but vocab_size={vocab_size} in its config")
    if library.encode("a").ids != library.encode("a", add_special_tokens=False).ids:
        say(f"the tokenizer of {folder} adds special tokens to each text, which is not done here")
    return tokenizer.dump()
