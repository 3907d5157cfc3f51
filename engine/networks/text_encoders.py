"""Text encoders of transformers: `input_ids [B, S]` -> hidden states and pooled embeddings."""

from torch import Tensor

from engine.networks.network import Network


class CLIPText(Network):
    """`CLIPTextModel` or `CLIPTextModelWithProjection`; which outputs, its spec names.

    `last_hidden_state` and `penultimate_hidden_state` are [B, S, D]; `pooled` is [B, P]: the
    projected embedding where there is a projection.
    """

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        encoded = self.module(inputs["input_ids"], output_hidden_states=True)
        projected = getattr(encoded, "text_embeds", None)
        states = {
            "last_hidden_state": encoded.last_hidden_state,
            "penultimate_hidden_state": encoded.hidden_states[-2],
            "pooled": encoded.pooler_output if projected is None else projected,
        }
        return tuple(states[tensor.name] for tensor in self.spec.outputs)


class T5Text(Network):
    """`T5EncoderModel` -> `last_hidden_state [B, S, D]`; it may take `attention_mask [B, S]`."""

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        mask = inputs.get("attention_mask")
        return (self.module(inputs["input_ids"], attention_mask=mask, return_dict=False)[0],)
