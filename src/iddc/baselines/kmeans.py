"""K-means on the backbone's embeddings, the baseline of Table 6."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.functional import normalize

from iddc.baselines.sampling import sample_embeddings
from iddc.clustering import KMeansConfig, spherical_kmeans
from iddc.config import Experiment, Runtime
from iddc.device import pick_device
from iddc.images import ImageFile, Skipped, refuse_many
from iddc.network import Centroids, build_network
from iddc.progress import SILENT, Progress
from iddc.runs import Run
from iddc.segmenter import Segmenter


def fit_kmeans(
    files: Sequence[ImageFile],
    experiment: Experiment,
    run: Run,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    config: KMeansConfig = KMeansConfig(),  # noqa: B008
    *,
    skipped: Sequence[Skipped] = (),
    progress: Progress = SILENT,
) -> Segmenter:
    """Cluster the embeddings of all images and leave the segmenter in the run's folder.

    Of the experiment it uses the number of clusters, the backbone, the seed, the working size, the
    windows, the precision and `objective.centering`: with "batch" the sample's mean is subtracted
    from the embeddings of length 1, as IDDC subtracts a batch's.

    Args:
        files: The images.
        experiment: What to cluster; its head is taken to be "centroids".
        run: The folder; see `Run.start`.
        runtime: How this machine works.
        config: How much work is done.
        skipped: Files that are left out already. They go to skipped.csv and count as unreadable.
        progress: Shows how far the work is.

    Raises:
        DataError: Too many images cannot be read, or there are fewer distinct embeddings than
            clusters.
        NumericError: An embedding is not finite.
    """
    experiment = experiment.model_copy(update={"head": "centroids"})
    network = build_network(experiment).eval().to(pick_device(runtime.device))
    vectors, unreadable = sample_embeddings(
        files,
        network.backbone,
        experiment,
        runtime,
        max_vectors=config.max_vectors,
        progress=progress,
    )
    left_out = [*skipped, *unreadable]
    run.write_skipped((str(item.file.name), item.reason) for item in left_out)
    refuse_many(
        {str(item.file.name): item.reason for item in left_out},
        len(files) + len(skipped),
        runtime.max_unreadable,
    )
    head = network.head
    assert isinstance(head, Centroids)
    vectors = normalize(vectors, dim=1)
    if experiment.objective.centering == "batch" and len(vectors):
        head.mean.copy_(vectors.mean(0))
        vectors -= head.mean
    progress.note(f"clustering {len(vectors):,} embeddings")
    result = spherical_kmeans(vectors, experiment.num_clusters, config, seed=experiment.seed)
    head.centroids.copy_(result.centroids)
    run.log(
        vectors=len(vectors),
        inertia=result.inertia,
        iterations=result.iterations,
        **config.model_dump(),
    )
    segmenter = Segmenter.of(network, experiment)
    segmenter.save(run.path)
    run.finish()
    return segmenter
