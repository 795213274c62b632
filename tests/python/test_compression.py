"""Large events come compressed to whoever asks, and a browser inflates them with what it has."""

from __future__ import annotations

import json
import zlib

import pytest
from websockets.asyncio.client import connect

from browser import browse
from safe_broadcaster import EventBroadcaster

PAGE = """<!doctype html><title>compressed</title><p id=state></p><p id=seqs></p><p id=text></p><script>
const show = (id, text) => { document.querySelector(id).textContent = text };
const inflate = async (bytes) => {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
};
const read = async (data) => {
  if (typeof data === "string") return JSON.parse(data);
  const head = new DataView(data).getUint16(1);
  const frame = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 3, head)));
  return { ...frame, data: await inflate(new Uint8Array(data, 3 + head)), inflated: true };
};
const socket = new WebSocket(`ws://${location.host}/ws`);
socket.binaryType = "arraybuffer";
const seqs = [];
let before = Promise.resolve();  // inflating takes turns: what comes later is not shown earlier
socket.onmessage = ({ data }) => {
  before = before.then(async () => {
    const frame = await read(data);
    if (frame.action) return show("#state", frame.compression);
    seqs.push(`${frame.seq}${frame.inflated ? "z" : ""}`);
    show("#seqs", seqs.join(" "));
    if (frame.data.text) show("#text", frame.data.text);
  });
};
socket.onopen = () => socket.send(JSON.stringify({
  type: "subscribe", data: { events: ["*"], compression: "deflate" },
}));
</script>"""


@pytest.mark.timeout(120)
async def test_a_browser_inflates_what_was_compressed(tmp_path) -> None:
    text = "Zürich, 東京, " * 500
    async with EventBroadcaster(port=0, page=PAGE) as hub, browse(f"http://127.0.0.1:{hub.port}/", tmp_path) as page:
        await page.shows("#state", lambda state: state == "deflate")
        await hub.broadcast_event({"type": "large", "text": text})
        await hub.broadcast_event({"type": "small"})
        await page.shows("#seqs", lambda seqs: seqs == "1z 2")
        assert await page.text("#text") == text
        assert hub.get_stats()["compressed"] == 1


async def test_a_compressed_frame_is_a_head_and_a_zlib_stream() -> None:
    event = {"type": "large", "text": "x" * 5000}
    async with EventBroadcaster(port=0) as hub, connect(hub.url) as socket:
        await socket.send(json.dumps({"type": "subscribe", "data": {"events": ["*"], "compression": "deflate"}}))
        assert json.loads(await socket.recv())["compression"] == "deflate"
        await hub.broadcast_event(event)
        frame = await socket.recv()
        assert isinstance(frame, bytes)
        begin = 3 + int.from_bytes(frame[1:3], "big")
        assert frame[0] == 1
        assert json.loads(frame[3:begin]) == {"type": "event", "seq": 1, "prev": 0}
        assert json.loads(zlib.decompress(frame[begin:])) == event
        assert len(frame) < 200
