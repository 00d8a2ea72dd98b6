# The gateway: docker build -t gradshield . ; compose.yaml runs it with PostgreSQL.
FROM python:3.12-slim
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src ./src
ARG TORCH_SOURCE="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN pip install --no-cache-dir ${TORCH_SOURCE} -c constraints.txt ".[gateway]" \
    && useradd --create-home gateway && mkdir /data && chown gateway /data
USER gateway
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz')"]
ENTRYPOINT ["gradshield"]
CMD ["serve", "--model", "lab", "--folder", "/data", "--host", "0.0.0.0"]
