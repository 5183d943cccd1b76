from tests.helpers import parse


def test_a():
    assert parse("g (float[N] x) => (float[N] y) {y = Relu(x)}")
