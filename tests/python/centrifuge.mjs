// A dashboard with Centrifugo's JavaScript client: tells each thing that it is told, one line of JSON each.
// node centrifuge.mjs URL CHANNEL…, where `centrifuge` and `ws` are installed (CENTRIFUGE_JS says where, see the test).
import { createRequire } from "node:module";

const require = createRequire(process.env.CENTRIFUGE_JS + "/");
const { Centrifuge } = require("centrifuge");
const [url, ...channels] = process.argv.slice(2);
const tell = (name, told) => process.stdout.write(JSON.stringify({ [name]: told }) + "\n");

const client = new Centrifuge(url, { websocket: require("ws"), minReconnectDelay: 20, maxReconnectDelay: 100 });
for (const name of ["connecting", "disconnected", "message"]) client.on(name, (told) => tell(name, told));
client.on("connected", () => tell("connected", {}));
for (const channel of channels) {
  const subscription = client.newSubscription(channel);
  for (const name of ["subscribed", "unsubscribed", "publication"]) subscription.on(name, (told) => tell(name, told));
  subscription.subscribe();
}
client.connect();

// Commands of the test, as methods of the client.
process.stdin.setEncoding("utf8");
let rest = "";
process.stdin.on("data", async (text) => {
  const lines = (rest + text).split("\n");
  rest = lines.pop();
  for (const line of lines) {
    const [method, ...values] = JSON.parse(line);
    await client[method](...values).then((told) => tell(method, told), (error) => tell("error", error));
  }
});
process.stdin.on("end", () => process.exit());
