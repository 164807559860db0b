// Players, on the front page and in the outputs of notebooks. A frame with a data address has an
// origin of its own, so the page cannot reach it. With the same text as srcdoc it can: the player
// takes the theme of the page, and the frame its height.
(() => {
  const root = document.documentElement;
  const start = "data:text/html;base64,";

  const fit = (frame) => {
    const inside = frame.contentWindow;
    if (!inside?.player) return;
    const theme = root.dataset.theme || "light";
    inside.document.documentElement.style.colorScheme = theme;
    inside.player.options.dark = theme === "dark";
    inside.player.repaint();
    frame.style.height = `${inside.document.getElementById("player").scrollHeight + 4}px`;
  };

  const open = (frame) => {
    const coded = frame.getAttribute("src").slice(start.length);
    const bytes = Uint8Array.from(atob(coded), (character) => character.charCodeAt(0));
    frame.srcdoc = new TextDecoder().decode(bytes);
    frame.removeAttribute("src");
  };

  const begin = () => {
    const frames = [...document.querySelectorAll(`iframe[srcdoc], iframe[src^="${start}"]`)];
    for (const frame of frames) {
      frame.addEventListener("load", () => fit(frame));
      if (frame.hasAttribute("srcdoc")) fit(frame);
      else open(frame);
    }
    const all = () => frames.forEach(fit);
    window.addEventListener("resize", all);
    new MutationObserver(all).observe(root, { attributeFilter: ["data-theme"] });
  };

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
