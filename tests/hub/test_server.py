"""Round trips of the real Hub client, so that what passes against this server means something."""

import os

import pytest
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from server import LFS_THRESHOLD, OTHER_TOKEN, READ_TOKEN


SMALL, LARGE = b'{"a": 1}', os.urandom(3 * LFS_THRESHOLD + 5)


@pytest.fixture
def folder(tmp_path):
    """Files of every kind of upload: small, empty, large, and small but always handled as large."""
    folder = tmp_path / "model"
    (folder / "sub folder").mkdir(parents=True)
    (folder / "config.json").write_bytes(SMALL)
    (folder / "empty.txt").touch()
    (folder / "sub folder" / "weights.bin").write_bytes(LARGE)
    (folder / "model.safetensors").write_bytes(SMALL)
    return folder


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def download(client, tmp_path):
    """Function that reads a file of a repository through a cache of its own."""
    caches = iter(range(100))

    def read(repo_id, path, client=client, **kwargs):
        cache = tmp_path / f"cache_{next(caches)}"
        with open(client.hf_hub_download(repo_id, path, cache_dir=cache, **kwargs), "rb") as file:
            return file.read()

    return read


@pytest.fixture
def published(client, repo_id, folder):
    """A repository with the files of `folder`."""
    client.create_repo(repo_id)
    client.upload_folder(repo_id=repo_id, folder_path=folder)
    return repo_id


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_uploaded_folder_comes_back_to_the_byte(client, published, folder, download, tmp_path):
    expected = contents(folder)
    snapshot = client.snapshot_download(published, cache_dir=tmp_path / "cache", ignore_patterns=".gitattributes")
    local = client.snapshot_download(published, local_dir=tmp_path / "local", allow_patterns=list(expected))
    assert contents(type(folder)(snapshot)) == expected
    assert {path: (tmp_path / "local" / path).read_bytes() for path in expected} == expected
    assert local == str(tmp_path / "local")
    assert {path: download(published, path) for path in expected} == expected


def test_listings_name_all_files_and_tell_large_ones(client, published):
    files = {".gitattributes", "config.json", "empty.txt", "model.safetensors", "sub folder/weights.bin"}
    info = client.model_info(published, files_metadata=True)
    assert set(client.list_repo_files(published)) == {file.rfilename for file in info.siblings} == files
    assert {file.rfilename for file in info.siblings if file.lfs} == {"model.safetensors", "sub folder/weights.bin"}
    assert [entry.path for entry in client.list_repo_tree(published, "sub folder")] == ["sub folder/weights.bin"]
    assert "sub folder" in {entry.path for entry in client.list_repo_tree(published)}
    (entry,) = client.get_paths_info(published, ["sub folder/weights.bin", "missing"])
    assert entry.size == entry.lfs.size == len(LARGE)
    assert client.file_exists(published, "config.json") and not client.file_exists(published, "missing")
    assert client.repo_exists(published) and not client.repo_exists("user/missing")


def test_checksums_of_a_download_are_verified(client, published, tmp_path):
    local = client.snapshot_download(published, local_dir=tmp_path / "local")
    assert client.verify_repo_checksums(published, local_dir=local).mismatches == []
    (tmp_path / "local" / "config.json").write_bytes(b"{}")
    assert [file["path"] for file in client.verify_repo_checksums(published, local_dir=local).mismatches]


def test_an_update_is_a_new_revision_and_the_old_one_stays(client, published, folder, download):
    old = client.model_info(published).sha
    client.create_tag(published, tag="v1")
    client.create_branch(published, branch="wip")
    (folder / "config.json").write_bytes(b'{"a": 2}')
    (folder / "sub folder" / "weights.bin").write_bytes(LARGE[::-1])
    new = client.upload_folder(repo_id=published, folder_path=folder, delete_patterns="empty.txt").oid
    client.delete_file("model.safetensors", published)
    client.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=published, revision="wip")

    assert new != old
    for revision in (old, "v1", "wip"):
        assert download(published, "config.json", revision=revision) == SMALL
        assert download(published, "sub folder/weights.bin", revision=revision) == LARGE
        assert client.file_exists(published, "model.safetensors", revision=revision)
    assert download(published, "config.json") == b'{"a": 2}'
    assert download(published, "sub folder/weights.bin") == LARGE[::-1]
    assert not client.file_exists(published, "model.safetensors") and not client.file_exists(published, "x")
    assert client.file_exists(published, "x", revision="wip")
    commits = [commit.commit_id for commit in client.list_repo_commits(published)]
    assert len(commits) == 4 and commits[1:3] == [new, old]
    refs = client.list_repo_refs(published)
    assert {branch.name: branch.target_commit for branch in refs.branches}["main"] == commits[0]
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": old}


def test_a_part_of_a_file_is_read_alone(hub, client, published):
    reader = HfFileSystem(endpoint=hub.url, token=client.token)
    assert reader.cat_file(f"{published}/sub folder/weights.bin", start=1000, end=1010) == LARGE[1000:1010]
    assert ("GET", f"/{published}/resolve/main/sub%20folder/weights.bin", 206) in hub.requests


def test_unchanged_files_make_no_commit(client, published, folder, hub):
    before = client.model_info(published).sha
    assert client.upload_folder(repo_id=published, folder_path=folder).oid == before
    assert list(hub.repositories[published].commits)[-1] == before


def test_a_commit_on_an_outdated_parent_is_refused(client, published):
    parent = client.model_info(published).sha
    client.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id=published, parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="412"):
        client.upload_file(path_or_fileobj=b"2", path_in_repo="x", repo_id=published, parent_commit=parent)


def test_a_repository_is_created_once(client, repo_id):
    assert client.create_repo(repo_id).repo_id == repo_id
    assert client.create_repo(repo_id, exist_ok=True).repo_id == repo_id
    assert client.create_repo(repo_id.split("/")[1], exist_ok=True).repo_id == repo_id  # of the token's user
    with pytest.raises(HfHubHTTPError, match="409"):
        client.create_repo(repo_id)


def test_what_is_missing_raises_the_clients_own_errors(client, published, download):
    with pytest.raises(RepositoryNotFoundError):
        client.model_info("user/missing")
    with pytest.raises(RevisionNotFoundError):
        client.model_info(published, revision="missing")
    with pytest.raises(RevisionNotFoundError):
        download(published, "config.json", revision="missing")
    with pytest.raises(EntryNotFoundError):
        download(published, "missing.json")
    with pytest.raises(EntryNotFoundError):
        client.delete_file("missing.json", published)


def test_a_private_repository_shows_only_to_its_owner(make_client, client, repo_id, download):
    client.create_repo(repo_id, private=True)
    client.upload_file(path_or_fileobj=SMALL, path_in_repo="config.json", repo_id=repo_id)
    assert client.model_info(repo_id).private
    assert download(repo_id, "config.json", client=make_client(READ_TOKEN)) == SMALL
    for token in (False, OTHER_TOKEN):
        with pytest.raises(RepositoryNotFoundError):
            make_client(token).model_info(repo_id)
        with pytest.raises(RepositoryNotFoundError):
            download(repo_id, "config.json", client=make_client(token))


@pytest.mark.parametrize("token, status", [(READ_TOKEN, 403), (OTHER_TOKEN, 403), ("hf_unknown", 401), (False, 401)])
def test_only_the_owners_write_token_writes(make_client, published, hub, token, status):
    client, before = make_client(token), hub.repositories[published].branches["main"]
    for write in (
        lambda: client.upload_file(path_or_fileobj=b"x", path_in_repo="config.json", repo_id=published),
        lambda: client.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.bin", repo_id=published),
        lambda: client.delete_file("config.json", published),
        lambda: client.create_repo("user/other"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            write()
        assert error.value.response.status_code == status
    assert hub.repositories[published].branches["main"] == before
    assert "user/other" not in hub.repositories


def test_whoami_knows_the_tokens(make_client):
    assert make_client().whoami()["name"] == make_client(READ_TOKEN).whoami()["name"] == "user"
    assert make_client(READ_TOKEN).whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        make_client("hf_unknown").whoami()


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n"])
def test_a_card_with_bad_metadata_is_refused(client, published, hub, card):
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        client.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=published)
    assert "README.md" not in hub.files(published)


def test_the_metadata_of_a_card_is_the_models(client, published):
    card = b"---\nlicense: mit\npipeline_tag: text-generation\ntags: [a]\n---\n# Model\n"
    client.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=published)
    info = client.model_info(published)
    assert (info.pipeline_tag, info.tags, info.card_data.license) == ("text-generation", ["a"], "mit")


@pytest.mark.parametrize(
    "fault, message",
    [
        (
            {"method": "PUT", "text": "/lfs/", "status": 403, "skip": 1},
            "Error while uploading",
        ),  # the second large file
        ({"method": "POST", "text": "/lfs/verify", "status": 404}, "Error while uploading"),
        ({"method": "POST", "text": "/preupload/", "status": 400}, "injected fault"),
        ({"method": "POST", "text": "/commit/", "status": 500}, "injected fault"),
        ({"method": "POST", "text": "/commit/", "status": None}, "disconnected"),  # in the middle of the request
    ],
    ids=["large file", "verification", "announcement", "commit", "broken commit"],
)
def test_a_failed_upload_leaves_the_old_revision_whole(client, published, folder, download, hub, fault, message):
    before = hub.repositories[published].branches["main"]
    expected = contents(folder)
    for path in ("sub folder/weights.bin", "model.safetensors", "config.json"):
        (folder / path).write_bytes(os.urandom(2 * LFS_THRESHOLD if path.endswith("bin") else 10))
    with hub.failing(**fault) as injected, pytest.raises(Exception, match=message):
        client.upload_folder(repo_id=published, folder_path=folder)
    assert injected.hits >= 1
    assert client.model_info(published).sha == before
    assert {path: download(published, path) for path in expected} == expected
    # The next try makes it good.
    client.upload_folder(repo_id=published, folder_path=folder)
    assert {path: download(published, path) for path in expected} == contents(folder)


def test_the_client_survives_passing_failures(client, repo_id, download, hub):
    client.create_repo(repo_id)
    with hub.failing("PUT", "/lfs/", status=500, times=1) as refused:
        client.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.bin", repo_id=repo_id)
    with hub.failing("GET", "/resolve/", status=None, times=1) as broken:
        assert download(repo_id, "weights.bin") == LARGE
    assert refused.hits == broken.hits == 1
