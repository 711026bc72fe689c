# An image with the command iddc and every extra that needs no compiler.
#
#   docker build -t iddc .
#   docker run --rm -v "$PWD:/work" iddc train photos/ -k 12 --out runs/photos
#
# Without a GPU, let pip take PyTorch's CPU build, which is ten times smaller: give the options that
# pytorch.org's page "Start Locally" shows for CPU, without the names of the packages:
#
#   docker build --build-arg TORCH="--index-url ADDRESS" -t iddc:cpu .
FROM python:3.12-slim

ARG TORCH=""
RUN apt-get update \
 && apt-get install -y --no-install-recommends ffmpeg \
 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir $TORCH torch torchvision
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir '.[label,export,formats,geo,codecs,plots]'

# Nobody needs to be root to segment photos. Give -u "$(id -u)" where the folder is yours alone.
RUN useradd --create-home iddc
USER iddc
WORKDIR /work
ENTRYPOINT ["iddc"]
CMD ["--help"]
