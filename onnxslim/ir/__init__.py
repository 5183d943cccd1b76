"""Models as passes see them: graphs, their files and protobufs, losing nothing."""
