# docker build -t onnxslim . && docker run --rm --user "$(id -u)" -v "$PWD:/work" onnxslim slim model.onnx small.onnx
FROM python:3.12-slim AS build
COPY . /src
RUN python -m venv /opt/onnxslim && /opt/onnxslim/bin/pip install --no-cache-dir "/src[cpu,images]"

FROM python:3.12-slim
COPY --from=build /opt/onnxslim /opt/onnxslim
# Without --user, results belong to this one, and the folder has to be writable for it. Any other will do: nothing is kept at home.
RUN useradd --create-home --uid 1000 onnxslim
USER 1000
ENV PATH=/opt/onnxslim/bin:$PATH PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
ENTRYPOINT ["onnxslim"]
CMD ["--help"]
