"""The op that draws: argmax over the vocabulary of logits plus scaled Gumbel noise."""
