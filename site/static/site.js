// Players: a frame with a data address has an origin of its own, so the page cannot reach it. With
// the same text as srcdoc it can, and the player takes the theme of the page.
(() => {
  const root = document.documentElement;
  const start = "data:text/html;base64,";
  const theme = () => root.dataset.theme || "light";
  const paint = (frame) => {
    const inside = frame.contentWindow;
    if (!inside?.player) return;
    inside.document.documentElement.style.colorScheme = theme();
    inside.player.options.dark = theme() === "dark";
    inside.player.repaint();
  };
  const begin = () => {
    const frames = [...document.querySelectorAll(`iframe[src^="${start}"]`)];
    for (const frame of frames) {
      const bytes = Uint8Array.from(atob(frame.getAttribute("src").slice(start.length)), (c) => c.charCodeAt(0));
      frame.addEventListener("load", () => paint(frame));
      frame.srcdoc = new TextDecoder().decode(bytes);
      frame.removeAttribute("src");
    }
    new MutationObserver(() => frames.forEach(paint)).observe(root, { attributeFilter: ["data-theme"] });
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
