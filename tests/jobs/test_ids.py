"""Identifiers carry their place, and no two are alike."""

from uuid import RFC_4122, UUID

from app.jobs.ids import host_hash, new_batch_id, new_job_ids, shard_of_host, shard_of_job


def test_the_shard_can_be_read_off_a_jobs_id() -> None:
    hosts = [f"h{number}.example" for number in range(1000)]
    ids = [UUID(bytes=given) for given in new_job_ids([host_hash(host) for host in hosts])]
    assert [shard_of_job(job_id) for job_id in ids] == [shard_of_host(host) for host in hosts]
    assert {(job_id.version, job_id.variant) for job_id in ids} == {(8, RFC_4122)}
    assert len(set(ids)) == 1000


def test_the_jobs_of_a_host_have_ids_in_their_order() -> None:
    hashes = [host_hash(f"h{number % 7}.example") for number in range(700)]
    ids = new_job_ids(hashes)
    for one in set(hashes):
        of_one = [job_id for job_id, its_hash in zip(ids, hashes, strict=True) if its_hash == one]
        assert of_one == sorted(of_one)


def test_batches_sort_by_the_time_they_came() -> None:
    ids = [new_batch_id() for _ in range(1000)]
    milliseconds = [batch_id.int >> 80 for batch_id in ids]
    assert milliseconds == sorted(milliseconds)
    assert {(batch_id.version, batch_id.variant) for batch_id in ids} == {(7, RFC_4122)}
    assert len(set(ids)) == 1000
