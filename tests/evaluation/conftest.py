import pytest
import tiny
import torch


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> str:
    """A tiny sentence encoder as sentence-transformers keeps it: a BERT and the mean of its tokens' states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None  # with one, the library would embed a chat of one message
    tokenizer.padding_side = "right"  # BERT counts positions from the left
    tokenizer.save_pretrained(folder / "bert")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(16)]).save(str(folder / "encoder"))
    return str(folder / "encoder")
