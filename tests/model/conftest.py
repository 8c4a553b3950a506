"""A float64 reference of the model's layer in NumPy."""

import numpy as np
import pytest
import torch


class Reference:
    """The formulas of the layer for one sequence x [T, d], in float64, with loops where the code has tensor operations."""

    @staticmethod
    def weights(module: torch.nn.Module) -> np.ndarray:
        return module.weight.detach().double().numpy()

    @staticmethod
    def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    @staticmethod
    def rotary(x: np.ndarray, first_position: int, base: float) -> np.ndarray:
        """x [T, D]: the pair (x_i, x_{i + D/2}) is a complex number, turned by position * base^(-2i/D)."""
        out, half = np.zeros_like(x), x.shape[1] // 2
        for t in range(x.shape[0]):
            for i in range(half):
                angle = (first_position + t) * base ** (-2 * i / x.shape[1])
                turned = complex(x[t, i], x[t, i + half]) * np.exp(1j * angle)
                out[t, i], out[t, i + half] = turned.real, turned.imag
        return out

    @staticmethod
    def causal_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """One head: query [Tq, D], key and value [Tk, D]; the queries are the last Tq of the Tk positions."""
        out = np.zeros((query.shape[0], value.shape[1]))
        for i in range(query.shape[0]):
            position = key.shape[0] - query.shape[0] + i
            scores = np.array([query[i] @ key[j] / np.sqrt(query.shape[1]) for j in range(position + 1)])
            weight = np.exp(scores - scores.max())
            out[i] = sum(w / weight.sum() * value[j] for j, w in enumerate(weight))
        return out

    @staticmethod
    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    @classmethod
    def attention(cls, module, x: np.ndarray, base: float) -> np.ndarray:
        width, heads = x.shape[1], []
        projection = cls.weights(module.query_key_value)
        query, key, value = x @ projection[:width].T, x @ projection[width : 2 * width].T, x @ projection[2 * width :].T
        for head in np.split(np.arange(width), module.heads):
            turned = [cls.rotary(part[:, head], 0, base) for part in (query, key)]
            heads.append(cls.causal_attention(*turned, value[:, head]))
        return np.concatenate(heads, axis=1) @ cls.weights(module.output).T

    @classmethod
    def mlp(cls, module, x: np.ndarray) -> np.ndarray:
        gate, value = np.split(x @ cls.weights(module.gate_value).T, 2, axis=1)
        return (cls.silu(gate) * value) @ cls.weights(module.output).T

    @classmethod
    def block(cls, layer, x: np.ndarray, base: float, conditioning: np.ndarray | None = None) -> np.ndarray:
        """x = N2(x + attention(N1 x)); x = N4(x + mlp(N3 x)); conditioning [1 or T, C] scales and shifts N1 x and N3 x."""
        scale1 = shift1 = scale3 = shift3 = 0.0
        if conditioning is not None:
            modulation = conditioning @ cls.weights(layer.modulation).T + layer.modulation.bias.detach().double().numpy()
            scale1, shift1, scale3, shift3 = np.split(modulation, 4, axis=-1)

        def norm(module, value):
            return cls.rms_norm(value, cls.weights(module), module.eps)

        x = norm(layer.norm2, x + cls.attention(layer.attention, norm(layer.norm1, x) * (1 + scale1) + shift1, base))
        return norm(layer.norm4, x + cls.mlp(layer.mlp, norm(layer.norm3, x) * (1 + scale3) + shift3))


@pytest.fixture
def reference() -> type[Reference]:
    return Reference
